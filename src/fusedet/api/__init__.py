"""The application layer: one typed function per command, public as `fusedet.train`, `fusedet.validate`, ...

Functions return dataclasses (see `fusedet.api.results`) and print nothing but the progress of a training.
`fusedet.api.settings` describes how settings are given.
"""
