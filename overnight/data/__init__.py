"""From a source to the rows of a night: read, normalised, sampled, split and tokenized."""
