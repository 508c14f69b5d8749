"""Dataset readers, one file per format, and the detection of the format."""
