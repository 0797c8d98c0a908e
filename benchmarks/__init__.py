"""What `make bench` measures; README.md says how."""
