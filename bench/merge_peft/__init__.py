"""MERGE-PEFT: adapters of five domains, really trained, really merged, and what each keeps."""
