"""TFDS builders of the IVCR-200K dialogues and videos."""
