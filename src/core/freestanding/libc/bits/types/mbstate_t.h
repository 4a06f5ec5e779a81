#pragma once
// libc++ uses the type in stream positions, which the kernel does not use.
typedef struct {
    int state;
} mbstate_t;
