"""The embedded offline default: a small RACE-format corpus of our own and a tiny ALBERT with random weights."""
