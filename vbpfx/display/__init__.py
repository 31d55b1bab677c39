"""What people read: tables, figures in words, and markup."""
