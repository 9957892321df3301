"""What other libraries offer, under their names: a script switches by changing an import."""
