"""What `python -m tierstore` can do, one module for each command, each with `add_command`.

A command parses what a person writes, calls the library, and shows what it returns. It prints results to stdout, everything
else to stderr, and returns its exit code.
"""
