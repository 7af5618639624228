"""What the scripts of both stages share: their parser, argument types, messages, exit status."""
