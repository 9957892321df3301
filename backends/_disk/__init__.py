"""The parts of the disk backends: each file is one job, and `disk` and `scratch` beside this package put them together."""
