"""The command line, and bringing the stack up on one machine or many."""
