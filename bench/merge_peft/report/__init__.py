"""Tables of labels, and the page of one run that shows them."""
