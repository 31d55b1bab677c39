"""Fine-tune a pruned network by distillation from the dense one."""
