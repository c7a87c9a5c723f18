"""What answers are worth: NumPy and plain records. Nothing here knows of models, datasets or devices."""
