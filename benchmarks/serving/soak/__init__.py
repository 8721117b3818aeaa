"""Mixed traffic for a long time, while processes are killed: does anything get lost or leak?"""
