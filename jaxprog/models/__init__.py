"""Networks whose classifier is the module named `head`."""
