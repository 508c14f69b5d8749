"""The verbs: each a function that puts the rooms below together; the command line only parses for them."""
