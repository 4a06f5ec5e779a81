#pragma once
#include <stdarg.h>
#include <stddef.h>
#define EOF (-1)
#define SEEK_SET 0
#ifdef __cplusplus
extern "C" {
#endif
typedef struct FILE FILE;
int remove(const char*);
int snprintf(char* __restrict, size_t, const char* __restrict, ...);
int vsnprintf(char* __restrict, size_t, const char* __restrict, va_list);
#ifdef __cplusplus
}
#endif
