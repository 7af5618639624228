"""What a script's exit status tells."""

EXIT_DONE, EXIT_UNUSABLE, EXIT_QUARANTINE, EXIT_INTERRUPTED = 0, 2, 3, 130
