"""What operators read: metrics, logs and the audit log."""
