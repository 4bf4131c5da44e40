/* Loaded into cloud-hypervisor. On some machines that are virtual themselves, KVM has no answer when it is asked for the state of
 * a guest's guests, and nothing is ever written to a file or moved. There are none: the answer is a header and nothing behind it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/kvm.h>
#include <stdarg.h>

int ioctl(int fd, unsigned long request, ...)
{
        static int (*real)(int, unsigned long, ...);
        va_list list;
        va_start(list, request);
        void *argument = va_arg(list, void *);
        va_end(list);
        if (!real) real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
        int answer = real(fd, request, argument);
        if (answer >= 0 || request != KVM_GET_NESTED_STATE) return answer;
        ((struct kvm_nested_state *)argument)->size = sizeof(struct kvm_nested_state);
        return 0;
}
