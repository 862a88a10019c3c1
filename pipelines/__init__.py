"""Everything between a catalogue entry and a finished run: configuration, tuning, retrieval, evaluation."""
