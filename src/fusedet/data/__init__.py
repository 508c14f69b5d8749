"""Datasets: readers, transforms, loaders, converters and a generator."""
