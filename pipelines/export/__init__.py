"""From a tuned run to a model of its own: merged, as GGUF, quantised, each step compared with the one before."""
