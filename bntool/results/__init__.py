"""Reports: the model summary, and the tables and counts that every report is made of."""
