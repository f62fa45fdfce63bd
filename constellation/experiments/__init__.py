"""One file, one question; README.md holds the answers."""
