"""tiny: the small video model that ships with svdit."""
