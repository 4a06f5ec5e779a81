// TRY(declaration, expression): unwraps a Result or returns its error. CO_TRY does the same in a coroutine. CHECK and
// CO_CHECK discard the value.
//
//     TRY(auto frame, memory.allocate(1));
//     CO_TRY(auto ring, co_await connect(device));
//     CHECK(table.add(rule));
#pragma once

#define FL_JOIN_(a, b) a##b
#define FL_JOIN(a, b) FL_JOIN_(a, b)
#define FL_TRY_(leave, temporary, declaration, ...)                                                                    \
    auto temporary = (__VA_ARGS__);                                                                                    \
    if (!temporary) [[unlikely]]                                                                                       \
        leave temporary.error();                                                                                       \
    declaration = *std::move(temporary)
#define TRY(declaration, ...) FL_TRY_(return, FL_JOIN(try_, __COUNTER__), declaration, __VA_ARGS__)
#define CO_TRY(declaration, ...) FL_TRY_(co_return, FL_JOIN(try_, __COUNTER__), declaration, __VA_ARGS__)
#define CHECK(...)                                                                                                     \
    if (auto checked = (__VA_ARGS__); !checked) [[unlikely]]                                                           \
    return checked.error()
#define CO_CHECK(...)                                                                                                  \
    if (auto checked = (__VA_ARGS__); !checked) [[unlikely]]                                                           \
    co_return checked.error()
