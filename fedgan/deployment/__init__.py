"""Keys and certificates of a federation whose members are separate machines."""
