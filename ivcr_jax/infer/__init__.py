"""From a model folder and a corpus of videos to a conversation. Nothing here knows of training or of datasets."""
