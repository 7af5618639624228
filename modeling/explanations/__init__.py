"""Why a run says what it says of a pair, and how far that can be believed."""
