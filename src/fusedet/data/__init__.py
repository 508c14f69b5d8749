"""Data sets: readers, transforms, loaders, converters and a generator."""
