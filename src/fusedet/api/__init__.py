"""The commands: each a function that puts the packages below together; the command line only parses for them."""
