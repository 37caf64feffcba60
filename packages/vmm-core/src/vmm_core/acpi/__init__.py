"""ACPI: an AML encoder and the tables and devices that every architecture's machines share. Source: ACPI 6.5."""
