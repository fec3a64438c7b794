"""Tables of measured figures, each made by one command. Not part of the installed package."""
