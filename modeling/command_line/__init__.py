"""The command line of this stage: the options that scripts share, the typed settings they fill, what is shown."""
