"""One file a task family: its wording, its sampling preset, how answers are drawn and how they are read."""
