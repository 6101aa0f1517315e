"""What compression costs: the real page formats, through the engine's own attention, beside the uncompressed model."""
