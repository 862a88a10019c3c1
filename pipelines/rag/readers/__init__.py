"""Readers of documents, one module for each family of files: bytes and a file stem -> a title and sections."""
