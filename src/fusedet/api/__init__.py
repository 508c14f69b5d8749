"""The application layer: one module and one typed function per command, public as `fusedet.train`, `fusedet.validate`, ...

Functions return dataclasses (`fusedet.api.results`) and print nothing but the progress of a training. How settings are given is described
in `fusedet.api.settings`.
"""
