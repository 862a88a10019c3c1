"""Retrieval-augmented generation: load -> chunk -> embed -> index -> retrieve -> answer."""
