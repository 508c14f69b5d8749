"""The page and the JSON interface to try a model in a browser: the command `app` (extra `app`)."""
