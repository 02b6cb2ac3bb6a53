"""What a stage minimises: flow matching, distillation, adversarial, progressive."""
