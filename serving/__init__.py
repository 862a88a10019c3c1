"""Serving: an engine in its own process, one gateway in front, retrieval in between. Start it with `llmlab serve`."""
