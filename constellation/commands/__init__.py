"""One module, one command of the command line; each exports `command`."""
