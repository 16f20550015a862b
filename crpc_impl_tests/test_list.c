/* impl-list: appending, removing, moving a whole list. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

typedef struct item {
    int number;
    crpci_list link;
} item;

/* The numbers in a list as text, in its order; checks the links backwards as well. */
static const char *text_of(const crpci_list *head)
{
    static char text[64];
    const crpci_list *l;
    size_t n = 0;
    text[0] = '\0';
    for (l = head->next; l != head; l = l->next) {
        assert_ptr_equal(l->prev->next, l);
        assert_ptr_equal(l->next->prev, l);
        n += (size_t)snprintf(
            text + n, sizeof text - n, "%d ",
            ((const item *)(const void *)((const char *)l - offsetof(item, link)))->number);
    }
    assert_ptr_equal(head->next->prev, head);
    assert_ptr_equal(head->prev->next, head);
    return text;
}

static void keeps_the_order_of_appending(void **state)
{
    crpci_list head;
    item items[4];
    int i;
    (void)state;
    crpci_list_init(&head);
    assert_true(crpci_list_empty(&head));
    for (i = 0; i < 4; i++) {
        items[i].number = i;
        crpci_list_append(&head, &items[i].link);
        assert_false(crpci_list_empty(&head));
    }
    assert_string_equal(text_of(&head), "0 1 2 3 ");
    crpci_list_remove(&items[1].link);
    assert_string_equal(text_of(&head), "0 2 3 ");
    assert_true(crpci_list_empty(&items[1].link));
    crpci_list_remove(&items[1].link); /* in no list: no effect */
    crpci_list_remove(&items[3].link);
    crpci_list_remove(&items[0].link);
    assert_string_equal(text_of(&head), "2 ");
    crpci_list_append(&head, &items[0].link);
    assert_string_equal(text_of(&head), "2 0 ");
    crpci_list_remove(&items[2].link);
    crpci_list_remove(&items[0].link);
    assert_true(crpci_list_empty(&head));
    assert_string_equal(text_of(&head), "");
}

static void moves_all_at_once(void **state)
{
    crpci_list from, to;
    item items[3];
    int i, n;
    (void)state;
    for (n = 0; n <= 3; n++) {
        static const char *const expected[] = {"", "0 ", "0 1 ", "0 1 2 "};
        crpci_list_init(&from);
        memset(&to, 0x55, sizeof to); /* the destination need not be initialised */
        for (i = 0; i < n; i++) {
            items[i].number = i;
            crpci_list_append(&from, &items[i].link);
        }
        crpci_list_move(&to, &from);
        assert_true(crpci_list_empty(&from));
        assert_string_equal(text_of(&from), "");
        assert_string_equal(text_of(&to), expected[n]);
        if (n) { /* both lists can be used */
            crpci_list_remove(&items[0].link);
            crpci_list_append(&from, &items[0].link);
            assert_string_equal(text_of(&from), "0 ");
            assert_string_equal(text_of(&to), expected[n] + 2);
        }
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(keeps_the_order_of_appending),
        CT_TEST(moves_all_at_once),
    };
    return CT_RUN(tests);
}
