"""Everything in vmm-core that differs on x86_64: registers, CPUID, boot protocols, tables, the address map."""
