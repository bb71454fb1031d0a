"""One fold, one insertion, one way to a served file, for every kind of model."""
