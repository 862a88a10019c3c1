"""Comparisons with other trainers, each measured in one run: `make bench`."""
