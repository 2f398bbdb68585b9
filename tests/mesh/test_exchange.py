"""The exchange of routed tokens between devices, against what one device would make of them."""
