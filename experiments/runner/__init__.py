"""From a config to a finished run: checking, planning, launching, training, recording."""
