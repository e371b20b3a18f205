"""Answers that outlive the replica: the client's connection ends here, the model is elsewhere."""
