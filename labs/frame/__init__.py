"""What every lab stands on: how it is declared, run and judged, and the small models that several of them train."""
